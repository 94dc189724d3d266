"""Tables, charts and templates -> one page."""
