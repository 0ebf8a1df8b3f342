"""OpenAI's client against `mpillama serve`.

mpirun -n 4 mpillama serve -m model.gguf &
python examples/openai_client.py http://127.0.0.1:8080
"""

import sys

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8080"
# The key matters only to a server that was started with --api-key.
client = OpenAI(base_url=f"{url}/v1", api_key="none")
model = client.models.list().data[0].id
print("model:", model)

completion = client.completions.create(model=model, prompt="Once upon a time", max_tokens=24, temperature=0)
print("completion:", completion.choices[0].text)

# Chat needs a model with a chat template, or a server with --chat-template.
messages = [{"role": "user", "content": "Tell me a story about a cat."}]
stream = client.chat.completions.create(model=model, messages=messages, max_tokens=24, stream=True)
print("chat: ", end="")
for chunk in stream:
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()

vectors = client.embeddings.create(model=model, input=["a cat", "a dog"], encoding_format="float")
print("embeddings:", len(vectors.data), "vectors of", len(vectors.data[0].embedding), "numbers")
