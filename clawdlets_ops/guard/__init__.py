"""Nothing secret gets into git: rules, the scan of what will be committed, and the hooks that run it."""
