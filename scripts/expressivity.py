"""The separation table: errors of each class of the family on the paper's witnesses, with one hidden unit."""

from __future__ import annotations

import argparse

from moa_ffn.expressivity import WIDTH, WITNESSES, fit, grid, relative_error


def main() -> None:
    """Build each witness, fit the weaker and the stronger class, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--starts", type=int, default=20, help="random starting points per fit")
    parser.add_argument("--steps", type=int, default=300, help="L-BFGS iterations per fit")
    parser.add_argument("--seed", type=int, default=0, help="seed of the starting points")
    args = parser.parse_args()
    x = grid()
    print(f"Relative RMS error on [-2, 2]^2 with {WIDTH} hidden unit; best of {args.starts} starts per fit.\n")
    print("| target | stronger class | built by hand | best fit | weaker class | best fit |")
    print("|---|---|---|---|---|---|")
    for witness in WITNESSES:
        built = relative_error(witness.built(), witness, x)
        strong, weak = (
            fit(ffns, witness, x, starts=args.starts, steps=args.steps, seed=args.seed)
            for ffns in ([witness.built()], witness.candidates())
        )
        row = (witness.formula, witness.stronger, f"{built:.0e}", f"{strong:.0e}", witness.weaker, f"{weak:.1e}")
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
