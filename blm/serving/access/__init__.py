"""Who may use the server, and how connections behave."""
