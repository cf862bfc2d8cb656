"""Long-context data synthesis."""
