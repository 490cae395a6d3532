"""Pictures, drawn without touching the user's matplotlib: no pyplot, no global state, no display."""
