"""Version 2 of the small LLaDA-V: denser pictures, longer answers, and a training that never helps pruning."""
