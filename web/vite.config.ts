import { defineConfig } from "vite";

// The built files are committed, so that nobody who serves needs Node: their names are the same in every build.
export default defineConfig({
  base: "./",
  build: {
    outDir: "../server/web/static",
    emptyOutDir: true,
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    rollupOptions: {
      output: {
        entryFileNames: "page/page.js",
        chunkFileNames: "page/[name].js",
        assetFileNames: "page/page[extname]",
      },
    },
  },
  server: {
    // `npm run dev` beside `make serve`
    proxy: Object.fromEntries(
      ["/page.json", "/compare", "/checkpoints", "/readyz", "/judge", "/studies"].map((path) => [path, "http://127.0.0.1:8000"]),
    ),
  },
});
