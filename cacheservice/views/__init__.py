"""What an operator may know: facts as values, and the renderers of these facts."""
