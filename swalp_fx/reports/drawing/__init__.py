"""What ``draw`` draws: marks, folded where a graph is large, as Graphviz source."""
