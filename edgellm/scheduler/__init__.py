"""Pure decisions about requests: what to send next, what to show, when to stop."""
