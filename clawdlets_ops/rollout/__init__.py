"""One workflow, many hosts: none waits for another, none stops another, and the API is read once for all of them."""
