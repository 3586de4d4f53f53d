"""For operators: status, metrics, the HTTP endpoint, systemd."""
