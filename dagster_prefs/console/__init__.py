"""The console: pages in a browser that show the running product. Only this room imports NiceGUI (extra `console`)."""
