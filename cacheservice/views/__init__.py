"""Views for operators: facts as values, and the renderers of these facts."""
