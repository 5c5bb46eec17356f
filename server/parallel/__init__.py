"""A model in several processes, a shard in each (tensor parallel): one leads, the others compute what it computes."""
