import { render } from "preact";
import { App } from "./app";
import { followTheme } from "./state";
import "./style.css";

followTheme();
render(<App />, document.getElementById("app")!);
