"""Jobs of a server: their rows, their queue, and the workers that execute them."""
