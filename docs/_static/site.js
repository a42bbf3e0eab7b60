// A figure opens at its full size when it is tapped: on a phone its text is small.
document.addEventListener("DOMContentLoaded", () => {
  for (const image of document.querySelectorAll(".bd-article img")) {
    if (image.closest("a")) continue;
    const link = document.createElement("a");
    link.href = image.src;
    link.title = "Full size";
    image.replaceWith(link);
    link.append(image);
  }
});

// A table with long texts in three columns or more: on a phone it is a list, and each cell needs its column's name.
document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll(".bd-article table.table")) {
    const names = [...table.querySelectorAll("thead th")].map((th) => th.textContent.trim());
    const cells = [...table.querySelectorAll("tbody td")];
    if (names.length < 3 || !cells.some((td) => td.textContent.length > 60)) continue;
    table.classList.add("sentences");
    for (const td of cells) td.dataset.column = names[td.cellIndex];
  }
});
