"""The front door: HTTP, the client and the command line. No torch, no Ray."""
