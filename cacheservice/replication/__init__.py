"""What one process sends to another: messages over a link."""
