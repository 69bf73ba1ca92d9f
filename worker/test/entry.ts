/** The Worker as it is, with the object's container replaced by the test's. */
import type { Bindings } from "../src/runtime";
import { Runtime } from "../src/runtime";
import { container } from "./container";

export { default } from "../src/index";

export class TestRuntime extends Runtime {
  constructor(ctx: DurableObjectState, env: Bindings) {
    super(ctx, { ...env, ...container.settings } as Bindings, container);
  }
}
