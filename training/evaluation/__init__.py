"""What steering does, measured: choices by likelihood, judged generations, gates."""
