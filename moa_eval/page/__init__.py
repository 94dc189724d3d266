"""Tables, charts and templates -> one page."""

from moa_startup.extras import require

require("moa_eval.page", "eval", "altair", "jinja2", "scipy", "vl_convert")
