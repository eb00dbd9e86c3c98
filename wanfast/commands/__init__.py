"""Parent halves of the commands: options -> frozen config -> run -> print. No torch here."""
