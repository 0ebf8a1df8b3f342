"""What is right and wrong with a job: facts of each rank, messages timed between them, and findings with fixes."""
