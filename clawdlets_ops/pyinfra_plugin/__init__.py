"""The pyinfra side: the connector ``@clawdlets/<host>``, one operation per stage, and the facts of a host."""
