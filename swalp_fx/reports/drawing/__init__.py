"""The drawing of ``draw``: marks, folded if the graph is large, then Graphviz source."""
