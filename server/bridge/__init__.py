"""The bridge to the Model Context Protocol, both ways, with its official SDK."""
