"""Programs, the boundary `E`, and control flow that may hold sites."""
