"""What operators see: status, metrics, the HTTP endpoint, systemd."""
