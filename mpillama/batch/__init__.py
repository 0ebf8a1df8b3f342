"""Work through a file of requests, survive what happens to the job, and answer each request exactly once."""
