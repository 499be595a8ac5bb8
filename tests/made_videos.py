"""Videos of slides, written by PyAV."""

from PIL import Image, ImageDraw


def slide(colour, number):
    image = Image.new("RGB", (320, 240), colour)
    ImageDraw.Draw(image).text((20, 100), f"Slide {number}", fill="black")
    return image


def make_video(path, scenes, gop_size=10):
    """Slides at 2 frames a second, each for so many seconds."""
    import av

    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=2)
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        stream.gop_size = gop_size
        for number, (colour, seconds) in enumerate(scenes):
            for _ in range(2 * seconds):
                frame = av.VideoFrame.from_image(slide(colour, number))
                container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
