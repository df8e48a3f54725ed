# The place of updates with automatic rollback, which are not built yet: nothing updates a host by itself.
{ ... }: { system.autoUpgrade.enable = false; }
