import { Component, h, type FunctionComponent } from "preact";

/** A component that is drawn again only where one of its properties is another one. */
export function memo<P extends object>(inner: FunctionComponent<P>): FunctionComponent<P> {
  class Memo extends Component<P> {
    override shouldComponentUpdate(next: P): boolean {
      const now = this.props as P;
      return (Object.keys(next) as (keyof P)[]).some((name) => next[name] !== now[name]);
    }
    override render(props: P) {
      return h(inner, props as never);
    }
  }
  return Memo as unknown as FunctionComponent<P>;
}
