"""What a model writes, taken apart as it comes: thoughts, text for people, tool calls."""
