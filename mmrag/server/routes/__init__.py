"""The routes, thin: each reads a request, calls a function of the server, and answers."""
