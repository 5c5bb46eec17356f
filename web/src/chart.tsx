// A small line chart. Its numbers stand in a table beside it, which is what a screen reader reads.

export interface Line {
  name: string;
  hue: number | null;
  points: { x: number; y: number }[];
}

const WIDTH = 340;
const HEIGHT = 190;
const LEFT = 38;
const BOTTOM = 30;
const TOP = 10;
const RIGHT = 12;

export function Chart(props: { title: string; lines: Line[]; xs: number[]; top?: number; x: string; format?: (value: number) => string }) {
  const { title, lines, xs, format = (value) => String(Number(value.toPrecision(2))) } = props;
  const [low, high] = [Math.min(...xs), Math.max(...xs)];
  const most = props.top ?? nice(Math.max(0, ...lines.flatMap((line) => line.points.map((point) => point.y))));
  const x = (value: number) => LEFT + ((value - low) / (high - low || 1)) * (WIDTH - LEFT - RIGHT);
  const y = (value: number) => HEIGHT - BOTTOM - (value / most) * (HEIGHT - BOTTOM - TOP);
  const ticks = [...new Set([low, 0, high])].filter((at) => at >= low && at <= high);
  return (
    <figure class="chart">
      <figcaption>
        {title}
        {lines.length > 1 && (
          <span class="keys">
            {lines.map((line) => (
              <span key={line.name}>
                <i class={`dot ${tint(line)}`} />
                {line.name}
              </span>
            ))}
          </span>
        )}
      </figcaption>
      <svg viewBox={`0 0 ${WIDTH} ${HEIGHT}`} role="img" aria-label={`${title} over the multiplier; the table has the numbers`}>
        {[0, 0.5, 1].map((share) => (
          <g key={share}>
            <line class="grid" x1={LEFT} x2={WIDTH - RIGHT} y1={y(share * most)} y2={y(share * most)} />
            <text x={LEFT - 6} y={y(share * most) + 4} text-anchor="end">
              {format(share * most)}
            </text>
          </g>
        ))}
        {low < 0 && high > 0 && <line class="grid zero" x1={x(0)} x2={x(0)} y1={TOP} y2={HEIGHT - BOTTOM} />}
        {ticks.map((at) => (
          <text key={at} x={x(at)} y={HEIGHT - BOTTOM + 15} text-anchor="middle">
            {at}
          </text>
        ))}
        <text x={(LEFT + WIDTH - RIGHT) / 2} y={HEIGHT - 2} text-anchor="middle">
          {props.x}
        </text>
        {lines.map((line) => (
          <g key={line.name} class={`line ${tint(line)}`}>
            <polyline points={line.points.map((point) => `${x(point.x)},${y(point.y)}`).join(" ")} />
            {line.points.map((point) => (
              <circle key={point.x} cx={x(point.x)} cy={y(point.y)} r="3.2">
                <title>{`${line.name}: ${format(point.y)} at ${point.x}`}</title>
              </circle>
            ))}
          </g>
        ))}
      </svg>
    </figure>
  );
}

const tint = (line: Line): string => (line.hue === null ? "a7" : `a${line.hue}`);

/** The next number above that reads well. */
function nice(value: number): number {
  if (value <= 0) return 1;
  const size = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 3, 4, 5, 6, 8, 10].find((step) => step * size >= value)! * size;
}
