"""``clawdlets doctor``: is this project fit to be committed, to be bootstrapped from, to be deployed from? Reads only."""
