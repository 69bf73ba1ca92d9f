import { cloudflareTest } from "@cloudflare/vitest-plugin";
import { defineConfig } from "vitest/config";
import { TOKEN } from "./test/token.ts";

export default defineConfig({
  plugins: [
    cloudflareTest({
      // Not wrangler.jsonc: its container would want a Docker engine.
      main: "./test/entry.ts",
      miniflare: {
        compatibilityDate: "2026-10-01",
        durableObjects: { RUNTIME: { className: "TestRuntime", useSQLite: true } },
        bindings: {
          RUNTIME_SERVICE_TOKEN: TOKEN,
          RUNTIME_INSTANCE_ID: "ada",
          PROVIDER_KEY: "sk-provider-key",
          NOT_TEXT: { a: 1 },
        },
      },
    }),
  ],
  test: { testTimeout: 30_000, hookTimeout: 30_000, include: ["test/**/*.test.ts"] },
});
