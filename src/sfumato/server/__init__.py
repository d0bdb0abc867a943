"""Pictures over HTTP: a durable queue, workers that batch across requests, a gallery of files, three dialects."""
