/**
 * The Worker: checks the service token, lets `/v1/*` through, and hands it to the one object that owns the one container.
 * No route of its own, no state, no page. What the requests mean is the supervisor's business.
 */
import { failure } from "./answers";
import { type Bindings, Runtime } from "./runtime";
import { isAuthorized, isUsable } from "./token";

export { Runtime };

// One name for ever: two objects would be two containers of one instance.
const runtime = (env: Bindings) => env.RUNTIME.getByName("runtime");

export default {
  async fetch(request, env) {
    const token = env.RUNTIME_SERVICE_TOKEN;
    if (!isUsable(token)) return failure(500, "misconfigured", "RUNTIME_SERVICE_TOKEN is invalid.");
    if (!(await isAuthorized(request.headers, token))) return failure(401, "unauthorized", "No valid token.");
    if (!new URL(request.url).pathname.startsWith("/v1/")) return failure(404, "not_found", "No such path.");
    return runtime(env).fetch(request);
  },

  /** An alarm that was lost would leave an instance down for ever: the cron trigger is its second chance. */
  async scheduled(_controller, env) {
    if (isUsable(env.RUNTIME_SERVICE_TOKEN)) await runtime(env).wake();
  },
} satisfies ExportedHandler<Bindings>;
