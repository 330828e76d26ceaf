// The card of a token: what its sources predict there. Shown on hover, kept on a click or tap, moved by arrow keys.
'use strict'
const data = JSON.parse(document.getElementById('data').textContent)
const card = document.getElementById('card')
let kept = null

function element(name, text, className) {
  const made = document.createElement(name)
  if (text !== undefined) made.textContent = text // never as HTML: tokens may be any text
  if (className) made.className = className
  return made
}

function prediction(source, token, index) {
  const box = element('div')
  if (data.sources.length > 1) box.append(element('div', source, 'muted'))
  const score = (name, value) => `${name} ${value === null ? '–' : value.toFixed(2)}`
  box.append(element('div', `${score('entropy', token.entropy[index])} · ${score('surprisal', token.surprisal[index])}`))
  if (token.hidden[index] !== null) box.append(element('div', token.hidden[index]))
  const list = element('ol')
  let rest = 1
  for (const [text, p] of token.top[index]) {
    const row = element('li', undefined, text === token.text ? 'actual' : '')
    row.style.setProperty('--p', `${100 * p}%`)
    row.append(element('span', text), element('span', percent(p)))
    list.append(row)
    rest -= p
  }
  if (token.top[index].length && rest > 0.0005) {
    const row = element('li', undefined, 'rest')
    row.append(element('span', 'all others'), element('span', percent(rest)))
    list.append(row)
  }
  box.append(token.top[index].length ? list : element('div', 'its predictions were not kept', 'muted'))
  return box
}

const percent = p => p >= 0.0995 ? `${(100 * p).toFixed(0)}%` : `${(100 * p).toFixed(1)}%`

function show(span) {
  document.querySelector('.t.on')?.classList.remove('on')
  card.hidden = !span
  if (!span) return
  span.classList.add('on')
  const token = data.tokens[span.dataset.i]
  const columns = element('div', undefined, 'columns')
  data.sources.forEach((source, index) => columns.append(prediction(source, token, index)))
  card.replaceChildren(element('b', token.text), columns)
  card.className = data.sources.length > 1 ? 'two' : ''
  const at = span.getBoundingClientRect()
  const below = at.bottom + 8 + card.offsetHeight < innerHeight || at.top < card.offsetHeight + 8
  card.style.top = `${below ? at.bottom + 8 : at.top - 8 - card.offsetHeight}px`
  const hidden = at.bottom + 12 - card.getBoundingClientRect().top
  if (innerWidth <= 704 && hidden > 0) scrollBy(0, hidden) // the card lies at the bottom of a narrow screen
  card.style.left = `${Math.max(8, Math.min(at.left, innerWidth - card.offsetWidth - 16))}px`
}

function keep(span) {
  kept = span
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
  if (event.key === 'Escape') keep(null)
  const text = document.activeElement.closest('.text')
  if (!step || !text) return
  event.preventDefault()
  const spans = [...text.querySelectorAll('.t')]
  keep(spans[Math.max(0, Math.min(spans.length - 1, spans.indexOf(kept) + step))])
})
for (const input of document.querySelectorAll('.views input')) {
  input.addEventListener('change', () => { document.body.className = `view-${input.value}` })
  if (input.checked) document.body.className = `view-${input.value}` // a reload keeps what was chosen
}
