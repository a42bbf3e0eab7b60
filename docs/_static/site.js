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
