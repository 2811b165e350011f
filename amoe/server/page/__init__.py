"""The live view at `/`: a page without any external resource, and `GET /live`, which it reads each second."""
