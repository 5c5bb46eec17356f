"""HTTP: schemas and handlers. Nothing here touches a tensor."""
