"""What the API process and the worker process say to each other, and how it is framed."""
