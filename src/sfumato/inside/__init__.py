"""Look inside a picture: its path out of the noise, where its words looked, what guidance and samplers do to it.

Every function takes a pipeline and the request of a picture, and yields as it computes; nothing here is kept.
"""
