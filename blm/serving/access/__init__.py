"""Access control: API keys, host and origin checks, login, and limits on connections."""
