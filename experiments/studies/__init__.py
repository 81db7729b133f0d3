"""One file a study: overrides only, and a docstring that says what it costs and what to expect."""
