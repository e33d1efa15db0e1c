"""Other libraries' loops. Each module imports its library when it is itself imported, never before."""
