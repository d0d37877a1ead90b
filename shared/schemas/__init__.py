"""Wire bodies of the HTTP API (JSON), one module per resource. Unknown fields are refused."""
