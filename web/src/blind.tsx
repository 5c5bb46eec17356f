export function Blind() { return <p>later</p>; }
