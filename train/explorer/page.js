// The card of a token shows the predictions of the sources. Hover shows it, a click or tap keeps it, arrow keys move it.
'use strict'
const data = JSON.parse(document.getElementById('data').textContent)
const card = document.getElementById('card')
let kept = null

const percent = p => `${(100 * p).toFixed(p >= 0.0995 ? 0 : 1)}%`

function element(name, className, ...children) {
  const made = document.createElement(name)
  made.className = className
  made.append(...children) // strings become text, never HTML: tokens may be any text
  return made
}

function row(text, p, className) {
  const made = element('li', className, element('span', '', text), element('span', '', percent(p)))
  made.style.setProperty('--p', `${100 * p}%`)
  return made
}

function prediction(source, token, index) {
  const score = name => `${name} ${token[name][index] === null ? '–' : token[name][index].toFixed(2)}`
  const seen = token.seen[index]
  const masked = seen === token.label ? 'masked, but unchanged' : `masked: the student sees ${seen}`
  const rows = token.top[index].map(([text, p]) => row(text, p, text === token.label ? 'actual' : ''))
  const rest = token.top[index].reduce((left, [, p]) => left - p, 1)
  if (rows.length && rest > 0.0005) rows.push(row('all others', rest, 'rest'))
  return element('div', '',
    element('div', 'dim', data.sources.length > 1 ? source : ''),
    element('div', '', `${score('entropy')} · ${score('surprisal')}`),
    element('div', '', seen === null ? '' : masked),
    rows.length ? element('ol', '', ...rows) : element('div', 'dim', 'no predictions are stored'))
}

function show(span) {
  document.querySelector('.t.on')?.classList.remove('on')
  card.hidden = !span
  if (!span) return
  span.classList.add('on')
  const token = data.tokens[span.dataset.i]
  const predictions = data.sources.map((source, index) => prediction(source, token, index))
  card.className = data.sources.length > 1 ? 'two' : ''
  card.replaceChildren(element('b', '', token.label), element('div', 'columns', ...predictions))
  const at = span.getBoundingClientRect()
  const above = at.bottom + 8 + card.offsetHeight > innerHeight && at.top > card.offsetHeight + 8
  card.style.top = `${above ? at.top - 8 - card.offsetHeight : at.bottom + 8}px`
  card.style.left = `${Math.max(8, Math.min(at.left, innerWidth - card.offsetWidth - 16))}px`
}

function keep(span) {
  kept = span
  span?.scrollIntoView({ block: 'nearest' }) // on a narrow screen the card is at the bottom
  show(span)
}

document.addEventListener('pointerover', event => {
  if (event.pointerType === 'mouse' && !kept) show(event.target.closest('.t'))
})
document.addEventListener('click', event => {
  const span = event.target.closest('.t')
  keep(span === kept ? null : span)
})
document.addEventListener('scroll', () => { if (!kept) show(null) }, { passive: true })
document.addEventListener('keydown', event => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key]
  const spans = [...document.querySelectorAll('.text:focus .t')]
  if (event.key === 'Escape') keep(null)
  if (!step || !spans.length) return
  event.preventDefault()
  keep(spans[Math.max(0, Math.min(spans.length - 1, spans.indexOf(kept) + step))])
})
for (const input of document.querySelectorAll('.views input')) {
  input.addEventListener('change', () => { document.body.className = `view-${input.value}` })
  if (input.checked) document.body.className = `view-${input.value}` // a reload keeps the chosen view
}
