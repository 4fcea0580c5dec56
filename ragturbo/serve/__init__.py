"""The endpoint: `ragturbo serve`, and the same application on Ray Serve. Needs the extra "serve"."""
